"""The schema's history (Alembic). A migration that has landed is never edited."""
