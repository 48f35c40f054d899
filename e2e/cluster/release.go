package cluster

import (
	"os"
)

// EnvRelease names the release of Kubernetes to run, one of those in the directory kubernetes. Where it is
// not set, the node runs the one of go.mod.
const EnvRelease = "E2E_KUBERNETES"

// KnowsAllFields reports whether the release has every field of deploy.yaml: serviceAccountTokenInSecrets of a
// CSIDriver is there since 1.35.
func KnowsAllFields() bool {
	release := os.Getenv(EnvRelease)
	return release == "" || release >= "1.35"
}

// Validation is what kubectl apply is to do with a field of deploy.yaml that the release does not know.
func Validation() string {
	if KnowsAllFields() {
		return "--validate=strict"
	}
	return "--validate=warn"
}
