"""Training on responses that the policy gives as it trains: rollouts, their rewards, their rows."""
