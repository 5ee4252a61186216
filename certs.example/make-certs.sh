#!/bin/sh
# Makes a throw-away authority and certificates in every layout that portero-py reads (needs openssl 1.1.1 or newer).
#
#   ./make-certs.sh [DIRECTORY] [NAME...]      default: ./certs  app.example "*.example" api.example
#
# The first name gets a folder, a wildcard gets "_wildcard.<parent>", the last name a combined file as HAProxy wants it.
# DIRECTORY/../ca.pem is the authority's certificate: curl --cacert ca.pem. Its key is thrown away at the end.
set -eu
umask 077

directory=${1:-certs}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- app.example '*.example' api.example

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$directory"

# A certificate and its key, signed by the authority:  issue NAME -> $work/leaf.pem, $work/key.pem
issue() {
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
        -subj "/CN=$1" -keyout "$work/key.pem" -out "$work/request.pem" 2>/dev/null
    printf 'subjectAltName=DNS:%s\nbasicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n' "$1" \
        >"$work/extensions"
    openssl x509 -req -in "$work/request.pem" -CA "$work/ca.pem" -CAkey "$work/ca-key.pem" \
        -set_serial "0x$(openssl rand -hex 16)" -days 90 -extfile "$work/extensions" -out "$work/leaf.pem" 2>/dev/null
}

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 \
    -subj "/CN=portero-py example authority" -keyout "$work/ca-key.pem" -out "$work/ca.pem" 2>/dev/null

left=$#
for name in "$@"; do
    left=$((left - 1))
    issue "$name"
    case $name in
        '*.'*) folder="$directory/_wildcard.${name#\*.}" ;;
        *) folder="$directory/$name" ;;
    esac
    if [ "$left" -eq 0 ] && [ $# -gt 1 ]; then
        # Written beside its place and renamed into it: nobody reads half a file.
        cat "$work/leaf.pem" "$work/ca.pem" "$work/key.pem" >"$folder.pem.new"
        mv "$folder.pem.new" "$folder.pem"
        echo "$folder.pem"
    else
        mkdir -p "$folder"
        cp "$work/key.pem" "$folder/privkey.pem.new"
        cat "$work/leaf.pem" "$work/ca.pem" >"$folder/fullchain.pem.new"
        mv "$folder/privkey.pem.new" "$folder/privkey.pem"
        mv "$folder/fullchain.pem.new" "$folder/fullchain.pem"
        echo "$folder/{fullchain.pem,privkey.pem}"
    fi
done

cp "$work/ca.pem" "$(dirname "$directory")/ca.pem"
chmod 644 "$(dirname "$directory")/ca.pem"
echo "$(dirname "$directory")/ca.pem (the authority: trust it in clients only while you try things)"
