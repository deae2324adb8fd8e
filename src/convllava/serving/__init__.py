"""An HTTP server with OpenAI's chat API for images, and a web page that uses it."""
