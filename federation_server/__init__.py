"""The federation's server: a control plane for neurons, kept in PostgreSQL.

Imports run one way: rpc → live → store → domain. `app.py` puts the parts together and `cli.py`
starts it. This module imports nothing, so that any part may read the version.
"""

__version__ = "0.1.0"
