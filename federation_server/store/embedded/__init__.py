"""The PostgreSQL that the federation brings along, for whoever sets no `DATABASE_URL`.

`EmbeddedPostgres` starts it, notices when it dies and stops it. It lives in the data folder and
ends with the process that started it, however that ends. `app.py` and the test suite call it.
"""

from federation_server.store.embedded.errors import (
    DataDirectoryInUse,
    DataDirectoryUnusable,
    EmbeddedPostgresError,
    PostgresNotInstalled,
    PostgresStartFailed,
)
from federation_server.store.embedded.role import SUPERUSER
from federation_server.store.embedded.supervisor import EmbeddedPostgres

__all__ = [
    "SUPERUSER",
    "DataDirectoryInUse",
    "DataDirectoryUnusable",
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "PostgresNotInstalled",
    "PostgresStartFailed",
]
