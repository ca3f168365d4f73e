"""Alembic migrations of the catalog database; `Catalog.migrate` runs them."""
