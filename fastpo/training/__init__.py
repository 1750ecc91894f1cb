"""The parts of a run that the trainer is made of: data, optimiser, processes, memory, statistics, guards."""
