"""API keys, and predictions by the key that asked."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from lawnwatch.migrations import create_index, drop_index

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.CHAR(16), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("sha256", sa.CHAR(64), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("revoked_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        if_not_exists=True,
    )
    create_index("ix_predictions_client_id", "predictions", "client", "id")
    create_index("ix_predictions_model_version_id", "predictions", "model_version", "id")


def downgrade() -> None:
    drop_index("ix_predictions_model_version_id", "predictions")
    drop_index("ix_predictions_client_id", "predictions")
    op.drop_table("api_keys", if_exists=True)
