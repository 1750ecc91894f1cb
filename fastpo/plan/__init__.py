"""`fastpo plan` and `max_tokens=auto`: memory and time of a run, from its configuration alone."""
