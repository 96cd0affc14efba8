"""The inference log: sampling, records, and the thread that writes them."""
