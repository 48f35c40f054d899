package cluster

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"time"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Claims are those of a ServiceAccount's token that the tests look at.
type Claims struct {
	Audiences  []string `json:"aud"`
	Expires    int64    `json:"exp"`
	IssuedAt   int64    `json:"iat"`
	Kubernetes struct {
		Pod struct {
			UID string `json:"uid"`
		} `json:"pod"`
	} `json:"kubernetes.io"`
}

// Lifetime is what the token is issued for.
func (c Claims) Lifetime() time.Duration { return time.Duration(c.Expires-c.IssuedAt) * time.Second }

// ParseClaims returns the claims of a token, which it does not verify.
func ParseClaims(token string) (c Claims, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, errors.New("this is not a token") // which must not be printed, should it be one
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return c, err
	}
	err = json.Unmarshal(payload, &c)
	return c, err
}

// RequestBoundToken requests a token of a Pod's ServiceAccount that ends with the Pod, as kubelet does.
func RequestBoundToken(ctx context.Context, client kubernetes.Interface, pod *core.Pod,
	lifetime time.Duration) (*authentication.TokenRequestStatus, error) {
	seconds := int64(lifetime.Seconds())
	request := &authentication.TokenRequest{Spec: authentication.TokenRequestSpec{
		ExpirationSeconds: &seconds,
		BoundObjectRef:    &authentication.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	accounts := client.CoreV1().ServiceAccounts(pod.Namespace)
	request, err := accounts.CreateToken(ctx, pod.Spec.ServiceAccountName, request, meta.CreateOptions{})
	if err != nil {
		return nil, err
	}
	return &request.Status, nil
}
