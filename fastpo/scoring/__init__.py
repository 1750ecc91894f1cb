"""Scorers of responses: functions, verifiers, reward models, judges, implicit rewards, and their combinations."""
