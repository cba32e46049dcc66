"""One wheel from the index that pip is set up with: the same configuration files, links and hashes. Imports no jax.

Sources: pip's documentation "Configuration"; PEP 503 (HTML index), PEP 691 (JSON index).
"""

import base64
import configparser
import hashlib
import html.parser
import http.client
import json
import netrc
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_INDEX = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_BLOCK = 1 << 20
_TRIES = 5
_FAILURES = (OSError, http.client.HTTPException)  # urllib.error.URLError and TimeoutError are OSErrors


class WheelError(Exception):
    """The wheel cannot be had; the message lists what was tried and why each failed, without passwords."""


@dataclass(frozen=True, slots=True)
class PipConfig:
    index_urls: tuple[str, ...] = (DEFAULT_INDEX,)
    find_links: tuple[str, ...] = ()  # folders, or pages of links
    certificates: str | None = None  # bundle of authorities
    client_certificate: str | None = None
    proxy: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    timeout: float = 15.0  # seconds without a byte


@dataclass(frozen=True, slots=True)
class Link:
    url: str
    sha256: str | None


def pip_config(environ: Mapping[str, str]) -> PipConfig:
    """What pip would use: its files (global, user, environment), then PIP_* variables; later ones win."""
    options: dict[str, str] = {}
    for path in _config_files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # pip itself reports a broken file
        for section in ("global", "install", "download"):
            if parser.has_section(section):
                options |= {_option(name): value for name, value in parser.items(section)}
    options |= {_option(name[4:]): value for name, value in environ.items() if name.startswith("PIP_") and value}
    no_index = options.get("no-index", "").lower() in ("1", "true", "yes", "on")
    indexes = [options.get("index-url") or DEFAULT_INDEX, *options.get("extra-index-url", "").split()]
    timeout = options.get("timeout") or options.get("default-timeout") or "15"
    return PipConfig(
        index_urls=() if no_index else tuple(dict.fromkeys(indexes)),
        find_links=tuple(options.get("find-links", "").split()),
        certificates=options.get("cert") or None,
        client_certificate=options.get("client-cert") or None,
        proxy=options.get("proxy") or None,
        trusted_hosts=tuple(options.get("trusted-host", "").split()),
        timeout=float(timeout) if re.fullmatch(r"\d+(\.\d+)?", timeout) else 15.0,
    )


def _option(name: str) -> str:
    return name.lower().replace("_", "-").removeprefix("--")


def _config_files(environ: Mapping[str, str]) -> list[str]:
    own = environ.get("PIP_CONFIG_FILE")
    if own == os.devnull:
        return []
    home = environ.get("HOME") or os.path.expanduser("~")
    site = [os.path.join(folder, "pip") for folder in environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if folder]
    user = os.path.join(environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"), "pip")
    mac = os.path.join(home, "Library", "Application Support", "pip")
    folders = [*site, "/etc", "/Library/Application Support/pip", os.path.join(home, ".pip"), mac, user, sys.prefix]
    return [os.path.join(folder, "pip.conf") for folder in folders] + ([own] if own else [])


def fetch_wheel(
    project: str,
    version: str,
    filename: str,
    path: str,
    config: PipConfig,
    *,
    progress: Callable[[int, int, str], None],
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Download one named wheel to path, its hash checked; progress(bytes done, bytes in all, line).

    Every place that pip would look in is tried in turn. A broken transfer is taken up where it broke; pause(seconds)
    waits between the tries. Raises WheelError with every place and its failure.
    """
    opener = _Opener(config)
    failures: list[str] = []
    progress(0, 0, f"looking for {project} {version}")
    for place in _places(project, config):
        try:
            links = [link for link in _links(opener, place) if _basename(link.url) == filename]
        except (*_FAILURES, ValueError, KeyError, AttributeError) as error:  # a page that is no index
            failures.append(f"{_redacted(place)}: {_reason(error)}")
            continue
        if not links:
            failures.append(f"{_redacted(place)}: has no {filename}")
        for link in links:
            try:
                _download(opener, link, path, progress, pause)
                return
            except _FAILURES as error:
                failures.append(f"{_redacted(link.url)}: {_reason(error)}")
    tried = "; ".join(failures) or "no index and no find-links are configured"
    raise WheelError(f"{filename} could not be fetched ({tried})")


def _places(project: str, config: PipConfig) -> list[str]:
    """Folders first (they cost nothing), then the indexes in pip's order."""
    name = re.sub(r"[-_.]+", "-", project).lower()
    pages = [f"{url.rstrip('/')}/{name}/" for url in config.index_urls]
    links = [place if "://" in place else _file_url(place) for place in config.find_links]
    return sorted([*links, *pages], key=lambda url: not url.startswith("file:"))


def _file_url(path: str) -> str:
    return "file://" + urllib.parse.quote(os.path.abspath(os.path.expanduser(path)))


def _local_path(url: str) -> str:
    return urllib.request.url2pathname(urllib.parse.urlsplit(url).path)


def _basename(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1])


def _links(opener: "_Opener", place: str) -> Iterator[Link]:
    if place.startswith("file:"):
        path = _local_path(place)
        page = os.path.join(path, "index.html")
        if os.path.isdir(path) and not os.path.isfile(page):
            return iter([Link(_file_url(os.path.join(path, name)), None) for name in sorted(os.listdir(path))])
        page = page if os.path.isdir(path) else path
        with open(page, encoding="utf-8", errors="replace") as file:
            return _html_links(file.read(), _file_url(page))
    with opener.open(place, {"Accept": _ACCEPT}) as reply:
        text, base = reply.read().decode("utf-8", "replace"), reply.geturl()
        kind = reply.headers.get_content_type()
    return _json_links(text, base) if kind.endswith("json") else _html_links(text, base)


def _json_links(text: str, base: str) -> Iterator[Link]:
    for file in json.loads(text).get("files", ()):
        yield Link(urllib.parse.urljoin(base, file["url"]), (file.get("hashes") or {}).get("sha256"))


def _html_links(text: str, base: str) -> Iterator[Link]:
    anchors = _Anchors(base)
    anchors.feed(text)
    for href in anchors.hrefs:
        url, _, fragment = urllib.parse.urljoin(anchors.base, href).partition("#")
        digest = re.search(r"sha256=([0-9a-f]{64})", fragment)
        yield Link(url, digest.group(1) if digest else None)


class _Anchors(html.parser.HTMLParser):
    """Collects the href of every <a>, and <base>."""

    def __init__(self, base: str):
        super().__init__()
        self.base, self.hrefs = base, []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "base" and href:
            self.base = urllib.parse.urljoin(self.base, href)
        elif tag == "a" and href:
            self.hrefs.append(href)


class _Opener:
    """urllib with pip's certificates, proxy and passwords; the environment's proxies come from urllib itself."""

    def __init__(self, config: PipConfig):
        self.config = config
        proxies = {"http": config.proxy, "https": config.proxy} if config.proxy else None
        handler = urllib.request.ProxyHandler(proxies)
        trusted = self._context(verify=False)
        self._strict = urllib.request.build_opener(
            handler, urllib.request.HTTPSHandler(context=self._context(verify=True))
        )
        self._trusting = urllib.request.build_opener(handler, urllib.request.HTTPSHandler(context=trusted))

    def open(self, url: str, headers: Mapping[str, str]) -> Any:
        bare, password = _split_password(url)
        request = urllib.request.Request(bare, headers={"User-Agent": "jaxserve", **headers})
        if password:
            # unredirected: another host must not be told
            request.add_unredirected_header("Authorization", password)
        host = urllib.parse.urlsplit(bare)
        trusted = {host.netloc, host.hostname} & set(self.config.trusted_hosts)
        return (self._trusting if trusted else self._strict).open(request, timeout=self.config.timeout)

    def _context(self, *, verify: bool) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.config.certificates)
        if self.config.client_certificate:
            context.load_cert_chain(self.config.client_certificate)
        if not verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context


def _split_password(url: str) -> tuple[str, str | None]:
    """https://user:password@host/… -> (https://host/…, "Basic …"); without one, what ~/.netrc says."""
    parts = urllib.parse.urlsplit(url)
    user, password = parts.username, parts.password
    if user is None:
        try:
            entry = netrc.netrc().authenticators(parts.hostname or "")
        except (OSError, netrc.NetrcParseError):
            entry = None
        if entry is None:
            return url, None
        user, _, password = entry
    pair = f"{urllib.parse.unquote(user)}:{urllib.parse.unquote(password or '')}"
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return bare, "Basic " + base64.b64encode(pair.encode()).decode()


def _redacted(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or error) or type(error).__name__


def _download(
    opener: _Opener,
    link: Link,
    path: str,
    progress: Callable[[int, int, str], None],
    pause: Callable[[float], None],
) -> None:
    name = _basename(link.url)
    open(path, "wb").close()
    for attempt in range(_TRIES):
        try:
            if link.url.startswith("file:"):
                _copy_local(_local_path(link.url), path, name, progress)
            else:
                _transfer(opener, link.url, path, name, progress)
        except _FAILURES as error:
            given_up = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
            if given_up or attempt == _TRIES - 1 or link.url.startswith("file:"):
                raise
            progress(os.path.getsize(path), 0, f"{name}: {_reason(error)}; trying again")
            pause(2.0**attempt)
            continue
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if link.sha256 is None or found == link.sha256:
            return
        if attempt == _TRIES - 1 or link.url.startswith("file:"):
            raise OSError(f"sha256 is {found}; the index says {link.sha256}")
        open(path, "wb").close()  # a transfer that was taken up may have mixed two files: begin again
    raise AssertionError("the last try returns or raises")


def _copy_local(source: str, path: str, name: str, progress: Callable[[int, int, str], None]) -> None:
    total, done = os.path.getsize(source), 0
    with open(source, "rb") as reader, open(path, "wb") as writer:
        while block := reader.read(_BLOCK):
            writer.write(block)
            progress(done := done + len(block), total, f"reading {name}")


def _transfer(opener: _Opener, url: str, path: str, name: str, progress: Callable[[int, int, str], None]) -> None:
    """Append what is missing of url to path. Raises OSError when fewer bytes come than were announced."""
    have = os.path.getsize(path)
    try:
        reply = opener.open(url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        open(path, "wb").close()
        raise ConnectionError("the server does not go on from where the transfer broke") from error
    with reply:
        have = have if reply.status == 206 else 0
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with open(path, "r+b") as file:
            file.truncate(have)
            file.seek(have)
            while block := reply.read(_BLOCK):
                file.write(block)
                progress(have := have + len(block), total, f"downloading {name}")
    if total and have != total:
        raise ConnectionError(f"the transfer ended after {have} of {total} bytes")
