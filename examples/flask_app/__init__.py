"""A Flask application that serves its models itself."""
