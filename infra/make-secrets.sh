#!/usr/bin/env bash
# Make the secrets of compose.yaml and of kubernetes/, once: `infra/make-secrets.sh ~/.hhnet-secrets`. Existing ones are
# kept.
set -euo pipefail

folder="${1:?usage: make-secrets.sh FOLDER}"
mkdir -p "$folder"
chmod 700 "$folder"

random() { head -c 32 /dev/urandom | base64 | tr -d '/+=\n'; }

keep() { # keep NAME: stdin becomes the file unless it is there
    if [[ -e "$folder/$1" ]]; then
        cat >/dev/null
    else
        cat >"$folder/$1"
        chmod 444 "$folder/$1" # the containers read it as another user; the folder itself is closed
    fi
}

key="$(random)"
secret="$(random)"
random | keep ray_token
random | keep redis_password
printf 'hhnet:%s' "$(random)" | keep prefect_auth
printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n' "$key" "$secret" | keep s3.env
# The clients' copy of the same keys, made from the file that counts.
(
    source "$folder/s3.env"
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY"
) | keep aws_credentials
echo "secrets are in $folder; export HHNET_SECRETS=$folder" >&2
