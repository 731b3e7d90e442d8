"""The control socket: its server, its client, and the commands that a running balancer answers."""
