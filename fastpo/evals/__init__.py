"""Measures of the field's papers, by their own rules: AlpacaEval, WildBench, RewardBench, pairwise win rates."""
