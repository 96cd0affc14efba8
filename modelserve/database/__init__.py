"""The SQL database: engine, transactions, tables and migrations, for SQLite and PostgreSQL."""
