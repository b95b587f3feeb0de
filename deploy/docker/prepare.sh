#!/bin/sh
# What the services of deploy/compose.yaml find when they start: an authority, and for each node its part of the
# model in /model and, if it has no certificate that still holds, a token. Run again, it adds what is missing.
set -eu
cd /var/lib/trifold
if [ ! -s authority/fingerprint ]; then
    rm -rf authority/keys
    told=$(trifold certs init authority/keys --host authority)
    echo "$told" | sed -n 's/^fingerprint //p' >authority/new
    mv authority/new authority/fingerprint
fi
[ -e authority/bundle ] || trifold split /model --out authority/bundle

node() {
    folder=$1 role=$2 part=$3
    mkdir -p "$folder/bundle"
    if [ ! -e "$folder/bundle/$part" ]; then
        rm -rf "$folder/bundle/$part.new"
        cp -r "authority/bundle/$part" "$folder/bundle/$part.new"
        mv "$folder/bundle/$part.new" "$folder/bundle/$part"
    fi
    # A certificate holds for a day, and running services renew it: an older one is of a node that was away.
    if [ -z "$(find "$folder" -path "$folder/node/chain.pem" -mmin -1430)" ]; then
        cp authority/fingerprint "$folder/"
        trifold certs token authority/keys --node "$folder-1" --role "$role" --tenant home \
            --host "$folder" --host localhost >"$folder/token"
    fi
}
node core core cloud
node edge edge edge
node device gateway device
touch device/keys.toml
