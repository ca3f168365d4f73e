"""How Alembic reaches the database: through the connection that `Catalog.migrate` hands over."""

from alembic import context

# Imported for the tables that they declare.
from lawnwatch import predictions, registry, rollout  # noqa: F401
from lawnwatch.catalog import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
