"""Responses of a policy: samplers in this process and of servers, and what passes between them and scorers."""
