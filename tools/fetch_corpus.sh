#!/bin/sh
# Write the training texts of the built-in model, kjv.txt and jargon.txt, into a folder.
#
#   tools/fetch_corpus.sh [FOLDER]        (default .corpus; needs a Debian-like system with apt, and python3)
#
# The texts come from the Debian packages bible-kjv-text (King James Bible) and dict-jargon (Jargon File 4.4.7),
# both in the public domain; the King James Bible is under Crown letters patent in the United Kingdom alone.
# Nothing is installed: the packages are unpacked in a temporary folder.
#
# The form of the output is what tools/train_tiny_llama.py reads: UTF-8 text, documents separated by a blank line.
# A document is one chapter (one verse a line) or one entry (one paragraph a line).
set -eu

out=${1:-.corpus}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
apt-get download bible-kjv bible-kjv-text dict-jargon
for package in ./*.deb; do dpkg -x "$package" root; done

# With -f the program prints one verse a line, as "Ge1:1 In the beginning ...".
root/usr/bin/bible -p root/usr/lib -f gen1:1-rev22:21 |
    awk '{ chapter = $1; sub(/:.*/, "", chapter); sub(/^[^ ]+ /, "")
           if (NR > 1 && chapter != last) print ""
           last = chapter; print }' >"$out/kjv.txt"

# Entries of the Jargon File are a headword at the margin, then paragraphs indented by exactly four spaces.
# Listings, tables and drawings are indented otherwise or hold few letters; coarse entries are left out.
gzip -dc root/usr/share/dictd/jargon.dict.dz >jargon.raw
python3 - jargon.raw >"$out/jargon.txt" <<'PYTHON'
import re
import sys

COARSE = re.compile(
    r"fuck|shit|nigg|cunt|\brap(e|ed|ing)\b|faggot|bitch|whore|\bass(es)?\b|asshole|porn|suck|\bsex|gang bang|\btits\b",
    re.IGNORECASE,
)
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "´": "'", "—": " -- ", "\u00a0": " ", "\u00ad": ""})


def paragraph(block: str) -> str:
    """The block as one line of plain prose, or nothing if it is not prose."""
    if not all(re.match(r" {4}[^ >|*]", line) for line in block.splitlines()):
        return ""
    text = " ".join(block.split())
    text = re.sub(r"(?<=[“‘]) | (?=[”,;.])", "", text).translate(PLAIN)
    text = re.sub(r"^(\d+[a-z]?\. |\[[^\]]*\] |(n|v|vt|vi|adj|adv|interj)\. )+", "", re.sub(r"\{ ?| ?\}", "", text))
    text = " ".join(text.split())
    letters = sum(c.isalpha() or c == " " for c in text)
    is_sentence = re.search(r"[.!?][\")]*$", text) and text.isascii() and "://" not in text
    return text if is_sentence and len(text) >= 80 and letters > 0.88 * len(text) else ""


with open(sys.argv[1], encoding="utf-8") as file:
    entries = re.split(r"\n(?=\S)", file.read())
documents = []
for entry in entries:
    head, _, body = entry.partition("\n")
    paragraphs = [text for text in map(paragraph, re.split(r"\n\s*\n", body)) if text]
    # The database's own notices have headwords that begin with 00-database.
    if paragraphs and not head.startswith("00-") and head.isascii() and not COARSE.search(entry):
        documents.append("\n".join([f"{head}: {paragraphs[0]}", *paragraphs[1:]]))
print("\n\n".join(documents))
PYTHON

wc -c "$out/kjv.txt" "$out/jargon.txt"
