"""The scheduler service: front-ends that speak gRPC and the core that plans every step. Knows no GPU."""
