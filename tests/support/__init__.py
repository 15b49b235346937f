"""What several tests share: small real pictures, a real S3 server."""
