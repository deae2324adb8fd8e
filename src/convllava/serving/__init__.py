"""A server that any OpenAI client can send pictures to."""
