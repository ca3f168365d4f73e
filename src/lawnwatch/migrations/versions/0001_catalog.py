"""Image records, labels and snapshots."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from lawnwatch.migrations import TABLE, create_index

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "labels",
        sa.Column("id", sa.Integer(), nullable=False),
        # Labels differ when their bytes differ: Löwenzahn is not Lowenzahn.
        sa.Column(
            "name",
            sa.String(190).with_variant(mysql.VARCHAR(190, collation="utf8mb4_bin"), "mysql", "mariadb"),
            nullable=False,
        ),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_labels"),
        sa.UniqueConstraint("name", name="uq_labels_name"),
        if_not_exists=True,
        **TABLE,
    )
    op.create_table(
        "images",
        sa.Column("id", NUMBER, autoincrement=True, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("url_sha256", sa.LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb"), nullable=False),
        sa.Column("label_id", sa.Integer(), nullable=False),
        sa.Column("label_source", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(500)),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("claimed_by", sa.String(120)),
        sa.Column("claimed_until", MOMENT),
        sa.Column("object_key", sa.String(255)),
        sa.Column("sha256", sa.CHAR(64)),
        sa.Column("phash", sa.CHAR(16)),
        sa.Column("width", sa.Integer()),
        sa.Column("height", sa.Integer()),
        sa.Column("bytes", sa.BigInteger()),
        sa.Column("format", sa.String(8)),
        sa.Column("brightness", sa.Float(53)),
        sa.Column("sharpness", sa.Float(53)),
        sa.Column("etag", sa.String(255)),
        sa.Column("last_modified", sa.String(64)),
        sa.Column("group_id", sa.CHAR(64)),
        sa.Column("split", sa.String(16)),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.Column("fetched_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_images"),
        sa.UniqueConstraint("url_sha256", name="uq_images_url_sha256"),
        sa.ForeignKeyConstraint(["label_id"], ["labels.id"], name="fk_images_label_id"),
        if_not_exists=True,
        **TABLE,
    )
    create_index("ix_images_state_id", "images", "state", "id")
    create_index("ix_images_sha256", "images", "sha256")
    create_index("ix_images_group_id", "images", "group_id")
    op.create_table(
        "label_history",
        sa.Column("id", NUMBER, autoincrement=True, nullable=False),
        sa.Column("image_id", NUMBER, nullable=False),
        sa.Column("label_id", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_label_history"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_label_history_image_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["label_id"], ["labels.id"], name="fk_label_history_label_id"),
        if_not_exists=True,
        **TABLE,
    )
    create_index("ix_label_history_image_id", "label_history", "image_id")
    op.create_table(
        "snapshots",
        sa.Column("id", sa.CHAR(64), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("counts", sa.JSON(), nullable=False),
        sa.Column("samples", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
        if_not_exists=True,
        **TABLE,
    )
    create_index("ix_snapshots_created_at", "snapshots", "created_at")


def downgrade() -> None:
    for table in ("snapshots", "label_history", "images", "labels"):
        op.drop_table(table, if_exists=True)
