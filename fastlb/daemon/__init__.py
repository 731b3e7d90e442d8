"""`fastlb run`: the balancer, the parts that it is made of, and what must hold on the host before it starts."""
