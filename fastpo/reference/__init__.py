"""Fixed policies that losses compare with: their log-probabilities, cached, from the data, or computed live."""
