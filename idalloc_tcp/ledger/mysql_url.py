"""The address of a MySQL database: mysql://user:password@host:port/database?ssl=…"""

import ssl
from typing import Any, Final, Self, final
from urllib.parse import parse_qsl, unquote, urlsplit

import attrs

DEFAULT_PORT: Final = 3306
#: `ssl=` of the URL: no encryption; encryption to whoever answers; encryption to who it should be.
SSL_MODES: Final = ("off", "on", "verify")


@final
@attrs.frozen
class MysqlUrl:
    """Where a database is and how to get in."""

    host: str
    port: int
    user: str
    password: str = attrs.field(repr=False)
    database: str
    ssl_mode: str = "off"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The database that `text` names.

        Raises:
            ValueError: with the reason, in one line that does not repeat `text`.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:  # Its text may quote the password.
            parts, port = None, None
        if parts is None or parts.scheme != "mysql" or not parts.hostname:
            raise ValueError("it is not mysql://user:password@host:port/database")
        database = unquote(parts.path.removeprefix("/"))
        if not database or "/" in database:
            raise ValueError("it names no database, as in mysql://user:password@host:3306/ids")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        ssl_mode = options.pop("ssl", "off")
        if ssl_mode not in SSL_MODES:
            raise ValueError(f"its ssl= is none of {', '.join(SSL_MODES)}")
        if options:
            raise ValueError(f"its option {next(iter(options))} is unknown; there is only ssl")
        return cls(
            host=parts.hostname,
            port=port or DEFAULT_PORT,
            user=unquote(parts.username or "root"),
            password=unquote(parts.password or ""),
            database=database,
            ssl_mode=ssl_mode,
        )

    def arguments(self) -> dict[str, Any]:
        """What the driver's `connect` takes."""
        return {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "password": self.password.encode(),  # Of text the driver makes Latin-1.
            "database": self.database,
            "ssl": self._ssl_context(),
        }

    def _ssl_context(self) -> ssl.SSLContext | None:
        if self.ssl_mode == "off":
            return None
        context = ssl.create_default_context()
        if self.ssl_mode == "on":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context
