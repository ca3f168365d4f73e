"""Airflow's asynchronous connections to a MySQL that demands TLS.

AIRFLOW__DATABASE__SQL_ALCHEMY_CONNECT_ARGS_ASYNC names `connect_args` here. Their driver, aiomysql, takes a TLS context
where the others take the CA's file as `ssl_ca` of the URL; the file is that of AIRFLOW__DATABASE__SQL_ALCHEMY_CONN.
"""

from __future__ import annotations

import ssl

from airflow.configuration import conf
from sqlalchemy import make_url

connect_args = {
    "ssl": ssl.create_default_context(
        cafile=str(make_url(conf.get_mandatory_value("database", "sql_alchemy_conn")).query["ssl_ca"])
    )
}
