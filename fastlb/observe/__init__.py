"""What a running balancer tells about itself: status, flows, the explanation of one packet, the logs."""
