"""A FastAPI application that serves its models itself."""
