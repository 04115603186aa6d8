"""The worker: executes plans on one device and reports what was sampled. Decides nothing about requests."""
