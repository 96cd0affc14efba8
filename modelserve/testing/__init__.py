"""What tests of modelserve, its adapters and its hosts share: contract suites per port, and fakes.

Nothing in the library imports this package. It needs pytest only where a contract suite is used.
"""
