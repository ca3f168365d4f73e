"""How Alembic reaches the database: through the connection that `Database.migrate` hands over."""

from typing import Any

import sqlalchemy as sa
from alembic import context

# Imported for the tables that they declare.
from lawnwatch import catalog, history, key_table, registry, rollout  # noqa: F401
from lawnwatch.database import metadata


def differs(_context: Any, _there: Any, _declared: Any, there: sa.types.TypeEngine[Any], declared: Any) -> bool | None:
    """Whether a column's type is another one; None leaves it to Alembic. FLOAT(53) and DOUBLE are one type in MySQL."""
    return False if isinstance(there, sa.Float) and isinstance(declared, sa.Float) else None


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    compare_type=differs,
)
with context.begin_transaction():
    context.run_migrations()
