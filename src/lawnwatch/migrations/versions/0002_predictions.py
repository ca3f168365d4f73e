"""What the API answered."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from lawnwatch.migrations import create_index

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "predictions",
        sa.Column("id", sa.CHAR(36), primary_key=True),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("client", sa.CHAR(16)),
        sa.Column("label", sa.String(190), nullable=False),
        sa.Column("confidence", sa.Float(53), nullable=False),
        sa.Column("probabilities", sa.JSON(), nullable=False),
        sa.Column("unknown_score", sa.Float(53)),
        sa.Column("model_name", sa.String(190), nullable=False),
        sa.Column("model_version", sa.Integer(), nullable=False),
        sa.Column("bundle_sha256", sa.CHAR(64), nullable=False),
        sa.Column("image_format", sa.String(8), nullable=False),
        sa.Column("image_width", sa.Integer(), nullable=False),
        sa.Column("image_height", sa.Integer(), nullable=False),
        sa.Column("image_bytes", sa.BigInteger(), nullable=False),
        sa.Column("image_key", sa.String(255)),
        sa.Column("brightness", sa.Float(53)),
        sa.Column("sharpness", sa.Float(53)),
        sa.Column("embedding", sa.LargeBinary(8192)),
        sa.Column("total_ms", sa.Float(53), nullable=False),
        if_not_exists=True,
    )
    create_index("ix_predictions_created_at", "predictions", "created_at")
    create_index("ix_predictions_label_id", "predictions", "label", "id")


def downgrade() -> None:
    op.drop_table("predictions", if_exists=True)
