#!/bin/sh
# Unpack Debian's PgBouncer, and what it links against, into a folder. Nothing is installed, and root is not needed.
# Where there is no apt, or no network, this says so and succeeds: the tests that need it then skip (in CI they fail).
set -eu
mkdir -p "$1"
cd "$1"
give_up() { echo "no PgBouncer for the tests: $1" >&2; exit 0; }
command -v apt-get > /dev/null && command -v dpkg > /dev/null || give_up "this system has no apt"

apt() { # lists and archives of our own: those of the system belong to root, and an image may have none
    program=$1; shift
    "$program" -qq -o Dir::State="$PWD/apt" -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache="$PWD/apt" \
        -o APT::Sandbox::User= "$@"
}
mkdir -p apt/lists/partial apt/archives/partial
apt apt-get update || give_up "apt cannot read its sources"
libraries=$(apt apt-cache depends pgbouncer | grep -oE 'lib(event|c-?ares)[^ ]*' | sort -u)
apt apt-get download pgbouncer $libraries || give_up "apt cannot fetch it"
for package in *.deb; do dpkg -x "$package" .; done
rm -rf apt ./*.deb
