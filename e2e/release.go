package main

import (
	"os"
)

// envKubernetes names the release of Kubernetes to run, one of those in the directory kubernetes. Where it is
// not set, the node runs the one of go.mod.
const envKubernetes = "E2E_KUBERNETES"

// knowsAllFields reports whether the release has every field of deploy.yaml: serviceAccountTokenInSecrets of a
// CSIDriver is there since 1.35.
func knowsAllFields() bool {
	release := os.Getenv(envKubernetes)
	return release == "" || release >= "1.35"
}

// validation is what kubectl apply is to do with a field of deploy.yaml that the release does not know.
func validation() string {
	if knowsAllFields() {
		return "--validate=strict"
	}
	return "--validate=warn"
}
