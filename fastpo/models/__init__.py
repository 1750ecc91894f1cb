"""The policy: a Hugging Face causal model, loaded, packed without padding, and verified."""
