"""What a run writes for people: log lines, callbacks, report.html, model card, hub."""
