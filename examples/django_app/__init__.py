"""A Django application that serves its models itself."""
