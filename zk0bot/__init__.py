"""zk0bot: robot owners fine-tune one SmolVLA policy together; no raw data leaves a machine."""
