"""When an answer counts as right, by the published rules, and what answers add up to."""
