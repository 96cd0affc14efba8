"""The HTTP faces: one framework-free mapping from request to response, mounted as ASGI or WSGI."""
