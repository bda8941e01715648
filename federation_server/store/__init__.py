"""PostgreSQL: the tables, one module for each concern, migrations, and a server of our own."""
