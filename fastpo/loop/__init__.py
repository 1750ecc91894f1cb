"""The loop of self-improvement: prompts, samples, judgements, pairs, training, and again."""
