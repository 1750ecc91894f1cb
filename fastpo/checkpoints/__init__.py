"""What is saved of a run, and how it goes on: checkpoints, the trained model, the lock of its folder."""
