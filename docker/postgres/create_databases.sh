#!/bin/bash
# Postgres runs this once, when its volume is empty: a role for each service, and a database that only it may use.
set -euo pipefail

create_database() {  # NAME PASSWORD
    PASSWORD="$2" psql --username "$POSTGRES_USER" --dbname postgres --no-psqlrc --set ON_ERROR_STOP=1 --set name="$1" <<'SQL'
\getenv password PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
}

create_database dagster "$DAGSTER_POSTGRES_PASSWORD"
create_database mlflow "$MLFLOW_POSTGRES_PASSWORD"
