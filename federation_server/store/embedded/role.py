"""Who owns what in the cluster: the superuser is the supervisor's, the server has its own role.

The server's role owns the schema `public` of the database and what is in it, because it makes and
drops partitions as time goes on. It may make no role and no database, and reads no file.
"""

from __future__ import annotations

from collections.abc import Callable

import psycopg

SUPERUSER = "postgres"
"""Makes the role and the database, and does nothing else."""

ROLE = "federation"
"""The server's, and whoever else's who asks for the URL."""

DATABASE = "federation"

_HAND_OVER = f"""
DO $$
DECLARE
    owned record;
BEGIN
    IF (SELECT nspowner = '{ROLE}'::regrole FROM pg_namespace WHERE nspname = 'public') THEN
        RETURN;
    END IF;
    FOR owned IN  -- their indexes, row types and own sequences go with them
        SELECT format('ALTER TABLE %s OWNER TO {ROLE}', oid::regclass) AS statement
        FROM pg_class c
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'S')
            AND NOT EXISTS (
                SELECT FROM pg_depend
                WHERE classid = 'pg_class'::regclass AND objid = c.oid AND deptype IN ('a', 'i')
                    AND c.relkind = 'S'
            )
        UNION ALL
        SELECT format('ALTER TYPE %s OWNER TO {ROLE}', oid::regtype)
        FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd')
        UNION ALL
        SELECT format('ALTER ROUTINE %s OWNER TO {ROLE}', oid::regprocedure)
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    LOOP
        EXECUTE owned.statement;
    END LOOP;
    ALTER SCHEMA public OWNER TO {ROLE};
END $$
"""
"""Gives the role what an earlier release, which knew the superuser alone, has made; all or nothing,
and nothing once the schema is the role's."""


def make_role_and_database(dsn: Callable[[str], str]) -> None:
    """Makes what is missing of the role, the database and what it owns in it.

    `dsn` gives the superuser's way to a database.

    Raises:
        psycopg.Error: PostgreSQL refuses.
    """
    with psycopg.connect(dsn("postgres"), autocommit=True) as connection:
        if not _is_there(connection, "SELECT FROM pg_roles WHERE rolname = %s", ROLE):
            connection.execute(f"CREATE ROLE {ROLE} LOGIN")
        if not _is_there(connection, "SELECT FROM pg_database WHERE datname = %s", DATABASE):
            connection.execute(f"CREATE DATABASE {DATABASE}")
    with psycopg.connect(dsn(DATABASE)) as connection:
        connection.execute(_HAND_OVER)


def _is_there(connection: psycopg.Connection[tuple[object, ...]], question: str, name: str) -> bool:
    return connection.execute(question.encode(), (name,)).fetchone() is not None
