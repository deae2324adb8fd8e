"""The generated world as a benchmark: accuracy by task, by the height of text, and on disturbed pages."""
