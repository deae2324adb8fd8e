"""What a stage learns: one module per objective."""
